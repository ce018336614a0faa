"""Tasks and measurements that show what a memory is worth."""
