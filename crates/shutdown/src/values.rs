//! Values that the workers of one phase make for those of the next. A value is there from when it is made until its phase
//! stops; no code of the user's runs under the lock.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One value of each type.
#[derive(Default)]
pub(crate) struct Values(Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>);

impl Values {
    pub(crate) fn put<T: Send + Sync + 'static>(&self, value: T) {
        let before = self.lock().insert(TypeId::of::<T>(), Arc::new(value));
        // Without the lock.
        drop(before);
    }

    pub(crate) fn remove<T: 'static>(&self) {
        let value = self.lock().remove(&TypeId::of::<T>());
        drop(value);
    }

    pub(crate) fn get<T: Clone + Send + Sync + 'static>(&self) -> Option<T> {
        let value = self.lock().get(&TypeId::of::<T>()).cloned();
        value?.downcast::<T>().ok().map(|value| (*value).clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TypeId, Arc<dyn Any + Send + Sync>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Values").field("len", &self.lock().len()).finish()
    }
}
