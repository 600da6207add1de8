//! Model folders: sound ones load, damaged and hostile ones are refused with a message.

mod checkpoint;
mod folder;
mod pages;
mod rope;
mod weights;
