"""Loading and saving in the formats of other libraries."""
