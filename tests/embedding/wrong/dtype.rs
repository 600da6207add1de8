//! A claim that is not the model's.

bespoke::bind! {
    mod model {
        dtype: BF16,
    }
}

fn main() {}
