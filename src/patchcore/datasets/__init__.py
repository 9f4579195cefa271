"""Reading data sets: folders in the MVTec AD layout, and the rendered demo set."""
