"""projgrad under other libraries' training loops; each file needs the library that it is named after."""
