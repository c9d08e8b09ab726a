"""Worker process: carries out compactions and maps positions to slots. Reports only times to the scheduler."""
