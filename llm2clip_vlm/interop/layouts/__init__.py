"""Names of weights in other code, as tables read both ways."""
