"""cli/: dolium, the commands for people. A client of the daemon; the start path imports no asyncio, http or sqlite."""
