"""Device process: carries out compactions and turns positions into slots. Tells the scheduler nothing but times."""
