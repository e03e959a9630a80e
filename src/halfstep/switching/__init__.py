"""Put a recipe on a program: region, working copies, loss scale, optimizer side."""
