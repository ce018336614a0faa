"""Text → tokens → ordered lanes."""

from nestling.stream.corpus import Corpus, CorpusError, Document, from_paths, read_documents, standard_library
from nestling.stream.lanes import Batch, Lanes, StreamError
from nestling.stream.parts import Part, Parts, joined, parts_of
from nestling.stream.tokenizer import ByteTokenizer, Tokenizer, TokenizerFile

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "CorpusError",
    "Document",
    "Lanes",
    "Part",
    "Parts",
    "StreamError",
    "Tokenizer",
    "TokenizerFile",
    "from_paths",
    "joined",
    "parts_of",
    "read_documents",
    "standard_library",
]
