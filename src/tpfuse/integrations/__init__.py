"""tpfuse inside of what people run already. Each integration is imported by its own name and needs its own library."""
