"""Parameters, multiply-adds and bytes, by formula and counted; time, measured."""
