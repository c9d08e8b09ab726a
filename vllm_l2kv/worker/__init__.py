"""Device process: carries out compactions and turns positions into slots. Reports only times to the scheduler."""
