//! Numbers of requests, each a type with its bounds: what is outside never gets past parsing, and
//! the schema says what the parser accepts.

use std::fmt;

use serde::Deserializer;
use serde::de::{Error, Unexpected, Visitor};
use utoipa::openapi::schema::{ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};

/// A whole number within bounds.
macro_rules! integer {
    ($(#[doc = $doc:literal])* $name:ident, $min:expr, $max:expr) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name(i64);

        impl $name {
            pub const MIN: i64 = $min;
            pub const MAX: i64 = $max;

            pub fn get(self) -> i64 {
                self.0
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                let bounds = IntegerBounds { min: $name::MIN, max: $name::MAX };
                deserializer.deserialize_any(bounds).map($name)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                schema(Type::Integer, concat!($($doc),*))
                    .minimum(Some($name::MIN))
                    .maximum(Some($name::MAX))
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}

/// A number within bounds.
macro_rules! number {
    ($(#[doc = $doc:literal])* $name:ident, $min:expr, $max:expr) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name(f64);

        impl $name {
            pub const MIN: f64 = $min;
            pub const MAX: f64 = $max;

            pub fn get(self) -> f32 {
                self.0 as f32
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                let bounds = NumberBounds { min: $name::MIN, max: $name::MAX };
                deserializer.deserialize_any(bounds).map($name)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                schema(Type::Number, concat!($($doc),*))
                    .minimum(Some($name::MIN))
                    .maximum(Some($name::MAX))
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}

integer!(
    /// Tokens to generate at most. The context may end earlier.
    MaxTokens, 1, i32::MAX as i64
);
integer!(
    /// Stop tokens are not generated before the answer has so many tokens.
    MinTokens, 0, i32::MAX as i64
);
integer!(
    /// Answers to one prompt.
    NumChoices, 1, 8
);
integer!(
    /// How many of the likeliest tokens are listed at each place.
    TopLogprobs, 0, 20
);
integer!(
    /// How many of the likeliest tokens are listed at each place.
    NumLogprobs, 0, 5
);
integer!(
    /// Keeps this many of the likeliest tokens; 0 and -1 keep all.
    TopK, -1, i32::MAX as i64
);
integer!(
    /// Start of the random numbers: equal seeds give equal answers.
    Seed, i64::MIN, i64::MAX
);
integer!(
    /// A token of the model.
    TokenId, 0, i32::MAX as i64
);
integer!(
    /// Numbers of an embedding.
    Dimensions, 1, i32::MAX as i64
);
integer!(
    /// A number of tokens.
    NumTokens, 0, i32::MAX as i64
);

number!(
    /// Divides the logits; 0 takes the likeliest token.
    Temperature, 0.0, 2.0
);
number!(
    /// Keeps the likeliest tokens up to this share of the probability, one at least.
    TopP, 0.0, 1.0
);
number!(
    /// Keeps tokens with at least this share of the likeliest token's probability.
    MinP, 0.0, 1.0
);
number!(
    /// Taken from the logits of tokens that the answer has.
    Penalty, -2.0, 2.0
);
number!(
    /// Divides positive and multiplies negative logits of tokens in prompt or answer; 1 changes
    /// nothing.
    RepetitionPenalty, 0.01, 100.0
);
number!(
    /// Added to the logit of a token.
    Bias, -100.0, 100.0
);

fn schema(kind: Type, doc: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::new(kind)).description(Some(doc.trim()))
}

struct IntegerBounds {
    min: i64,
    max: i64,
}

impl IntegerBounds {
    fn check<E: Error>(&self, value: i64) -> Result<i64, E> {
        match (self.min..=self.max).contains(&value) {
            true => Ok(value),
            false => Err(E::invalid_value(Unexpected::Signed(value), self)),
        }
    }
}

impl Visitor<'_> for IntegerBounds {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from {} to {}", self.min, self.max)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<i64, E> {
        self.check(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<i64, E> {
        match i64::try_from(value) {
            Ok(value) => self.check(value),
            Err(_) => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
        }
    }

    /// JSON does not tell 1.0 from 1.
    fn visit_f64<E: Error>(self, value: f64) -> Result<i64, E> {
        // NOTE: larger ones are rounded, or were too large for an integer.
        let limit = 9_007_199_254_740_992.0;
        match value.fract() == 0.0 && (-limit..=limit).contains(&value) {
            true => self.check(value as i64),
            false => Err(E::invalid_value(Unexpected::Float(value), &self)),
        }
    }
}

struct NumberBounds {
    min: f64,
    max: f64,
}

impl Visitor<'_> for NumberBounds {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a number from {} to {}", self.min, self.max)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<f64, E> {
        self.visit_f64(value as f64)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<f64, E> {
        self.visit_f64(value as f64)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<f64, E> {
        match (self.min..=self.max).contains(&value) {
            true => Ok(value),
            false => Err(E::invalid_value(Unexpected::Float(value), &self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;

    fn read<T: DeserializeOwned>(value: Value) -> Result<T, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn integers_have_bounds() {
        let check = |value: Value, expect: Option<i64>| {
            let got = read::<NumChoices>(value.clone()).map(NumChoices::get);
            assert_eq!(got.as_ref().ok(), expect.as_ref(), "{value}: {got:?}");
        };
        check(json!(1), Some(1));
        check(json!(8), Some(8));
        check(json!(8.0), Some(8));
        for value in [
            json!(0),
            json!(9),
            json!(-1),
            json!(1.5),
            json!(1e300),
            json!(-1e300),
            json!(i64::MAX),
            json!(u64::MAX),
            json!(i64::MIN),
            json!("1"),
            json!(true),
            json!(null),
            json!([1]),
        ] {
            check(value, None);
        }
        assert_eq!(read::<Seed>(json!(i64::MIN)).map(Seed::get), Ok(i64::MIN));
        assert!(read::<Seed>(json!(9_223_372_036_854_775_808_u64)).is_err());
        assert!(read::<Seed>(json!(9_223_372_036_854_775_808.0)).is_err());
        let error = read::<NumChoices>(json!(9)).unwrap_err();
        assert_eq!(error, "invalid value: integer `9`, expected a whole number from 1 to 8");
    }

    #[test]
    fn numbers_have_bounds() {
        for (value, expect) in
            [(json!(0), Some(0.0)), (json!(2), Some(2.0)), (json!(0.5), Some(0.5))]
        {
            assert_eq!(read::<Temperature>(value).map(Temperature::get).ok(), expect);
        }
        for value in [json!(-0.1), json!(2.1), json!(1e300), json!("1"), json!(null), json!({})] {
            assert!(read::<Temperature>(value.clone()).is_err(), "{value}");
        }
    }
}
