//! The tutorial's second exercise, "build a task group that can cancel all tasks together", with the test it comes with.

#![expect(unused_mut, unused_must_use, reason = "the test is as the exercise has it")]

use std::time::Duration;

use cancel_safe_shutdown::TaskGroup;

// On a paused clock: a machine that stalls for 100 ms would wake both sleepers at once.
#[tokio::test(start_paused = true)]
async fn test_task_group() {
    let mut group = TaskGroup::new();

    group.spawn("fast".to_string(), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
    });

    group.spawn("slow".to_string(), async {
        tokio::time::sleep(Duration::from_secs(10)).await;
    });

    tokio::time::sleep(Duration::from_millis(200)).await;
    group.cancel_all().await;

    let result = group.wait().await;
    assert_eq!(result.completed.len(), 1);
    assert_eq!(result.cancelled.len(), 1);
}
