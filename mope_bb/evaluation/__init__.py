"""Methods compared: their answers, the statistics with intervals, the table and the report."""
