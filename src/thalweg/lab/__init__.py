"""The laboratory: recipes with claims, the run store, executors, figures and reports. It knows no science."""
