//! A map that forgets what was used least recently when it grows too heavy.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Holds entries up to a total weight. Look-ups and insertions take O(log n).
#[derive(Debug)]
pub(crate) struct Bounded<K, V> {
    max_weight: u64,
    weight: u64,
    /// Counts uses; every entry knows when it was used last.
    uses: u64,
    entries: HashMap<K, Entry<V>>,
    by_use: BTreeMap<u64, K>,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: u64,
    used: u64,
}

impl<K: Clone + Eq + Hash, V: Clone> Bounded<K, V> {
    /// An empty map; `max_weight` is in the unit of [`Bounded::insert`]'s `weight`.
    pub(crate) fn new(max_weight: u64) -> Self {
        Self { max_weight, weight: 0, uses: 0, entries: HashMap::new(), by_use: BTreeMap::new() }
    }

    /// The value under `key`, which counts as a use of it.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        self.uses += 1;
        let entry = self.entries.get_mut(key)?;
        self.by_use.remove(&entry.used);
        entry.used = self.uses;
        self.by_use.insert(self.uses, key.clone());
        Some(entry.value.clone())
    }

    /// Keeps `value`, and drops others until all fit. What is heavier than the whole map is not kept.
    pub(crate) fn insert(&mut self, key: K, value: V, weight: u64) {
        self.remove(&key);
        if weight > self.max_weight {
            return;
        }
        while self.weight + weight > self.max_weight {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.remove(&oldest);
        }
        self.uses += 1;
        self.weight += weight;
        self.by_use.insert(self.uses, key.clone());
        self.entries.insert(key, Entry { value, weight, used: self.uses });
    }

    fn remove(&mut self, key: &K) {
        if let Some(entry) = self.entries.remove(key) {
            self.weight -= entry.weight;
            self.by_use.remove(&entry.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_recently_used_goes_first() {
        let mut map = Bounded::new(3);
        for key in ["a", "b", "c"] {
            map.insert(key, (), 1);
        }
        assert!(map.get(&"a").is_some());
        map.insert("d", (), 1);
        assert!(map.get(&"b").is_none());
        assert!(map.get(&"a").is_some() && map.get(&"c").is_some() && map.get(&"d").is_some());
    }

    #[test]
    fn weight_stays_bounded() {
        let mut map = Bounded::new(100);
        for key in 0..1000_u64 {
            map.insert(key % 37, key, key % 50);
            let total: u64 = map.entries.values().map(|entry| entry.weight).sum();
            assert_eq!(total, map.weight);
            assert!(total <= 100);
            assert_eq!(map.entries.len(), map.by_use.len());
        }
        map.insert(1, 0, 101);
        assert!(map.get(&1).is_none(), "too heavy to keep, and the old value is stale");
    }
}
