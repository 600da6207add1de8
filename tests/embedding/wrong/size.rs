//! A claim that is not the model's.

bespoke::bind! {
    mod model {
        hidden_size: 129,
    }
}

fn main() {}
