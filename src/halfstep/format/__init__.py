"""What a number is: formats as frozen data, and the exact scalar codec."""
