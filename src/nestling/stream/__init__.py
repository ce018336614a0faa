"""Text → tokens → ordered lanes."""

from nestling.stream.corpus import Corpus, CorpusError, Document, from_paths, read_documents, standard_library
from nestling.stream.lanes import Batch, Lanes, StreamError
from nestling.stream.tokenizer import ByteTokenizer, Tokenizer, TokenizerFile

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "CorpusError",
    "Document",
    "Lanes",
    "StreamError",
    "Tokenizer",
    "TokenizerFile",
    "from_paths",
    "read_documents",
    "standard_library",
]
