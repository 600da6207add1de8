//! Model folders: sound ones load, damaged and hostile ones are refused with a message.

mod checkpoint;
mod folder;
mod formats;
mod mixed;
mod pages;
mod rope;
mod weights;
