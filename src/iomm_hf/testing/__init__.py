"""What tests and offline trials need: tiny components and a local Hub server."""
