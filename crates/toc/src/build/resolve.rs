//! Following symbolic links inside the layer, never above its root.
//!
//! containerd resolves the parents of a member with a function of its own (continuity's `RootPath`): it rewrites the path
//! link by link and cleans it *lexically* in between, so that `..` after a link does not always mean what it means to the
//! kernel. The same steps in the same order give the same answer here.

use super::error::BuildError;
use super::path::{components, join};
use super::tree::{ROOT, Slot, Tree, check_name};
use crate::format::Kind;
use crate::read::MAX_PATH;

/// Links followed for one path; containerd's limit.
const MAX_LINKS: u32 = 255;

/// A path with one more component, and whether that was a symbolic link.
struct Step {
    path: Vec<u8>,
    is_link: bool,
}

impl Tree<'_> {
    /// The absolute path, free of symbolic links and `..`, that `path` leads to. It need not exist.
    pub(super) fn resolve(&mut self, path: &[u8]) -> Result<Vec<u8>, BuildError> {
        let mut path = path.to_vec();
        if path.is_empty() {
            return Ok(vec![b'/']);
        }
        let mut links = 0;
        loop {
            let before = links;
            let walked = self.walk_links(&path, &mut links)?;
            if before == links {
                let cleaned = join(b"/", &walked);
                if cleaned == walked {
                    return Ok(cleaned);
                }
                path = cleaned;
            } else {
                path = walked;
            }
            if path.len() >= MAX_PATH {
                return Err(BuildError::member(&path, "path gets too long when its symbolic links are followed"));
            }
        }
    }

    /// One pass over `path`, replacing the links it meets.
    fn walk_links(&mut self, path: &[u8], links: &mut u32) -> Result<Vec<u8>, BuildError> {
        let mut current: Option<Vec<u8>> = path.starts_with(b"/").then(|| vec![b'/']);
        for component in components(path) {
            current = Some(match current {
                None => self.follow(component, links)?.path,
                Some(directory) => {
                    let step = self.follow(&join(&directory, component), links)?;
                    if step.is_link && !step.path.starts_with(b"/") { join(&directory, &step.path) } else { step.path }
                }
            });
            if current.as_ref().is_some_and(|path| path.len() >= MAX_PATH) {
                return Err(BuildError::member(path, "path gets too long when its symbolic links are followed"));
            }
        }
        Ok(current.unwrap_or_else(|| vec![b'/']))
    }

    /// The text of the symbolic link at `path`, or `path` itself, made absolute.
    fn follow(&mut self, path: &[u8], links: &mut u32) -> Result<Step, BuildError> {
        if *links > MAX_LINKS {
            return Err(BuildError::member(path, "too many symbolic links"));
        }
        let path = join(b"/", path);
        match self.stat(&path)? {
            Slot::Node(node) if self.nodes[node as usize].kind == Kind::Symlink => {
                *links += 1;
                let link = self.nodes[node as usize];
                Ok(Step { path: self.text(link.a, link.b).to_vec(), is_link: true })
            }
            _ => Ok(Step { path, is_link: false }),
        }
    }

    /// What is at `path`, whose last component is not followed. A link on the way counts as missing: the caller's next pass
    /// replaces it first.
    pub(super) fn stat(&mut self, path: &[u8]) -> Result<Slot, BuildError> {
        let mut slot = Slot::Node(ROOT);
        for component in components(path) {
            self.link_work += 1;
            if self.link_work > self.budget.max_link_work {
                return Err(BuildError::over("steps through symbolic links", self.budget.max_link_work));
            }
            check_name(component, path)?;
            slot = match slot {
                Slot::Node(node) if self.is_directory(node) => self.lookup(node, component),
                Slot::Node(node) if self.nodes[node as usize].kind == Kind::Symlink => Slot::Absent,
                Slot::Absent => Slot::Absent,
                Slot::Node(_) => return Err(BuildError::member(path, "a parent is not a directory")),
                Slot::Whiteout => return Err(BuildError::position_matters(path, "a parent is a whiteout")),
            };
        }
        Ok(slot)
    }
}
