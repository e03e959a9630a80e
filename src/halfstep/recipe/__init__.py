"""Where which number is used: recipes as frozen data, and their text form."""
