"""The processes of a run: torch.distributed, and the watch over ranks that die or hang."""
