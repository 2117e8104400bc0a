"""The parts of `hypergrad.search`: how proposals are trained, recorded and repeated."""
