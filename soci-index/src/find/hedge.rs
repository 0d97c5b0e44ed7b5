//! Hedged requests to several places in order: the next place is asked when one fails, or concurrently when one is
//! silent.
//!
//! What an attempt does and what its failure means is the caller's; the only edge here is the clock.

use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

/// How long an attempt may be silent before the next one is started concurrently: far longer than a registry at work
/// takes, and short for a program that waits.
pub const HEDGE: Duration = Duration::from_secs(2);

/// The result of the first attempt that succeeds, else the errors of all, in the order in which they came.
///
/// Attempts are begun in order, each when one before it has failed or after [`HEDGE`] without any end. Those that still
/// run when there is a result are dropped.
///
/// # Errors
/// None if there was no attempt, else one of each.
pub async fn first<T, E, F>(attempts: impl IntoIterator<Item = F>) -> Result<T, Vec<E>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = attempts.into_iter().peekable();
    let mut running: FuturesUnordered<F> = waiting.next().into_iter().collect();
    let mut errors = Vec::new();
    loop {
        let has_more = waiting.peek().is_some();
        tokio::select! {
            ended = running.next() => match ended {
                Some(Ok(result)) => return Ok(result),
                Some(Err(error)) => {
                    errors.push(error);
                    running.extend(waiting.next());
                }
                None => return Err(errors),
            },
            () = tokio::time::sleep(HEDGE), if has_more => running.extend(waiting.next()),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use futures_util::future::{BoxFuture, pending, ready};
    use tokio::time::Instant;

    use super::*;

    type Attempt = BoxFuture<'static, Result<u8, u8>>;

    fn after(seconds: u64, result: Result<u8, u8>) -> Attempt {
        async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            result
        }
        .boxed()
    }

    fn never() -> Attempt {
        pending().boxed()
    }

    /// (attempts, the result, the seconds that it takes)
    #[tokio::test(start_paused = true)]
    async fn the_next_is_asked_when_one_fails_or_is_silent() {
        let table = [
            (vec![], Err(vec![]), 0),
            (vec![ready(Ok(1)).boxed(), never()], Ok(1), 0),
            (vec![after(1, Ok(1)), ready(Ok(2)).boxed()], Ok(1), 1),
            (vec![after(1, Err(1)), after(1, Ok(2))], Ok(2), 2),
            (vec![never(), after(1, Ok(2))], Ok(2), 3),
            (vec![never(), never(), after(1, Ok(3))], Ok(3), 5),
            (vec![after(3, Ok(1)), after(7, Ok(2))], Ok(1), 3),
            (vec![after(5, Err(1)), after(1, Err(2))], Err(vec![2, 1]), 5),
        ];
        for (attempts, result, seconds) in table {
            let start = Instant::now();
            assert_eq!(first(attempts).await, result);
            assert_eq!(start.elapsed(), Duration::from_secs(seconds));
        }
    }
}
