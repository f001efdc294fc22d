"""What both workers share around the engine: settings, start-up, the Join stream, the step loop."""
