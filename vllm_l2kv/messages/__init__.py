"""What crosses a process boundary, one module a message; standard library only."""
