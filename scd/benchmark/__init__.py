"""How fast it is: commands that print a table and write JSON, with the floor beside each figure."""
