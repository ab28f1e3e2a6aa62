"""Which recipe for which complaint: answered from arithmetic and from what was measured."""
