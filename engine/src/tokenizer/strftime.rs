//! `strftime` for chat templates that tell the model the date.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// A point in time, in UTC.
struct Time {
    year: i64,
    /// 1 to 12
    month: usize,
    /// 1 to 31
    day: usize,
    /// 1 to 366
    year_day: i64,
    /// Monday is 0.
    week_day: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

/// `seconds` since 1970 written as `format` asks. An error names the directive that is not known.
pub(super) fn format(format: &str, seconds: u64) -> Result<String, String> {
    let time = Time::at(seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let mut directive = chars.next();
        // glibc's `%-d`: no padding.
        let is_padded = directive != Some('-');
        if !is_padded {
            directive = chars.next();
        }
        let text = directive.and_then(|directive| time.field(directive)).ok_or_else(|| {
            format!("strftime_now: {format:?} has a directive that is not supported")
        })?;
        match is_padded {
            true => out.push_str(&text),
            false => out.push_str(match text.trim_start_matches(['0', ' ']) {
                "" => "0",
                short => short,
            }),
        }
    }
    Ok(out)
}

impl Time {
    /// Days to a date after Howard Hinnant's "chrono-compatible low-level date algorithms".
    fn at(seconds: u64) -> Time {
        let days = (seconds / 86_400) as i64;
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let era_day = shifted.rem_euclid(146_097);
        let era_year = (era_day - era_day / 1_460 + era_day / 36_524 - era_day / 146_096) / 365;
        let march_day = era_day - (365 * era_year + era_year / 4 - era_year / 100);
        let march_month = (5 * march_day + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era_year + era * 400 + i64::from(month <= 2);
        let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        // Days from the first of March: 306 of them lie before the first of January.
        let year_day = match month <= 2 {
            true => march_day - 306,
            false => march_day + 59 + i64::from(is_leap),
        };
        Time {
            year,
            month: month as usize,
            day: (march_day - (153 * march_month + 2) / 5 + 1) as usize,
            year_day: year_day + 1,
            week_day: (days + 3).rem_euclid(7) as usize,
            hour: seconds / 3_600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    fn field(&self, directive: char) -> Option<String> {
        let month = MONTHS[self.month - 1];
        let week_day = DAYS[self.week_day];
        let date = format!("{:04}-{:02}-{:02}", self.year, self.month, self.day);
        let clock = format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second);
        Some(match directive {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'A' => week_day.to_owned(),
            'a' => week_day[..3].to_owned(),
            'j' => format!("{:03}", self.year_day),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{:02}", (self.hour + 11) % 12 + 1),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'F' => date,
            'T' => clock,
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn writes_dates() {
        let check = |seconds, format, expect: &str| {
            assert_eq!(super::format(format, seconds).as_deref(), Ok(expect));
        };
        check(0, "%A %d %B %Y %H:%M:%S %p %j", "Thursday 01 January 1970 00:00:00 AM 001");
        // 29 February 2024, 13:07:09.
        check(
            1_709_212_029,
            "%-d %b %y, %I:%M %p, %F %T, day %j",
            "29 Feb 24, 01:07 PM, 2024-02-29 13:07:09, day 060",
        );
        check(1_735_603_200, "%F %j %a 100%%", "2024-12-31 366 Tue 100%");
        check(1_677_628_800, "%F %j", "2023-03-01 060");
        assert!(super::format("%Q", 0).is_err());
        assert!(super::format("50%", 0).is_err());
    }
}
