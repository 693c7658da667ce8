//! A bounded memory of what was used last.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Values that together weigh no more than a limit; those not used for the longest time are dropped first.
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    limit: usize,
    weight: usize,
    clock: u64,
    values: HashMap<K, Entry<V>>,
    by_use: BTreeMap<u64, K>,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: usize,
    used: u64,
}

impl<K: Copy + Eq + Hash, V> Lru<K, V> {
    /// Empty. The unit of `limit` is that of the weights.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, weight: 0, clock: 0, values: HashMap::new(), by_use: BTreeMap::new() }
    }

    /// The value of `key`, which now was used last.
    pub(crate) fn get(&mut self, key: &K) -> Option<&V> {
        let entry = self.values.get_mut(key)?;
        self.by_use.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(&entry.value)
    }

    /// Sets the value of `key` and drops others to make room; itself too when it is heavier than the limit.
    pub(crate) fn insert(&mut self, key: K, value: V, weight: usize) {
        self.remove(&key);
        self.clock += 1;
        self.weight += weight;
        self.values.insert(key, Entry { value, weight, used: self.clock });
        self.by_use.insert(self.clock, key);
        while self.weight > self.limit {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.remove(&oldest);
        }
    }

    /// Takes the value of `key` out.
    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.values.remove(key)?;
        self.weight -= entry.weight;
        self.by_use.remove(&entry.used);
        Some(entry.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_forgets_what_was_not_used_and_never_grows_beyond_its_limit() {
        let mut lru = Lru::new(100);
        lru.insert(1, (), 40);
        lru.insert(2, (), 40);
        assert!(lru.get(&1).is_some());
        lru.insert(3, (), 40);
        assert!(lru.get(&2).is_none());
        assert!(lru.get(&1).is_some() && lru.get(&3).is_some());
        lru.insert(3, (), 40);
        assert_eq!((lru.weight, lru.values.len(), lru.by_use.len()), (80, 2, 2));
        lru.insert(4, (), 101);
        assert_eq!((lru.weight, lru.values.len(), lru.by_use.len()), (0, 0, 0));
    }
}
