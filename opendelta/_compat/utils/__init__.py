"""`opendelta.utils` of OpenDelta 0.3."""
