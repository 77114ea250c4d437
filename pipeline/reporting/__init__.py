"""Reports of one run or of several: tables, curves and pictures on pages that need nothing but themselves."""
