"""Making a merged model better by measurement."""
