"""From files in the inbox, or in a folder, to tracks in the queue, and from there to the archive."""
