"""How this package's programs are started as processes of their own, from a clone or installed, and the
machine that they are on."""
