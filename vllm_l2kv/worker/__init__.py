"""Device process: carries out compactions and turns positions into slots. Never talks back to the scheduler."""
