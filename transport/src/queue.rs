//! Owns the messages that wait for one slow peer: bounded by number and bytes.

use std::collections::VecDeque;

use proto_msgs::Frame;

use crate::{Limits, SendError};

#[derive(Debug, Default)]
pub(crate) struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Queue {
    /// Adds a message unless that would break a limit. A single message always fits.
    pub(crate) fn push(&mut self, frame: Frame, limits: &Limits) -> Result<(), SendError> {
        if !self.has_room(&frame, limits) {
            return Err(SendError::Full);
        }
        self.bytes += frame.size_bytes();
        self.frames.push_back(frame);
        Ok(())
    }

    /// Whether the message would fit.
    pub(crate) fn has_room(&self, frame: &Frame, limits: &Limits) -> bool {
        let fits =
            self.frames.len() < limits.overflow_frames && self.bytes + frame.size_bytes() <= limits.overflow_bytes;
        fits || self.frames.is_empty()
    }

    /// Hands up to `most` messages to `offer`, oldest first, until it refuses one, which stays. Returns the number
    /// taken.
    ///
    /// # Errors
    /// `Gone` if the peer is gone.
    pub(crate) fn drain(
        &mut self,
        most: usize,
        mut offer: impl FnMut(&Frame) -> Result<(), SendError>,
    ) -> Result<usize, SendError> {
        for sent in 0..most {
            let Some(frame) = self.frames.front() else { return Ok(sent) };
            match offer(frame) {
                Ok(()) => {}
                Err(SendError::Full) => return Ok(sent),
                Err(SendError::Gone) => return Err(SendError::Gone),
            }
            self.bytes -= frame.size_bytes();
            self.frames.pop_front();
        }
        Ok(most)
    }

    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }
}
