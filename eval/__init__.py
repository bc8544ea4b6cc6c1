"""How good an annotator is: metrics, evaluation runs, figures, the report page. Speaks of cells, donors, batches."""
