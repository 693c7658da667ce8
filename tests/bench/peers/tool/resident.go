package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// residentFile is a file with the half-open ranges of its pages that are in memory.
type residentFile struct {
	Path  string     `json:"path"`
	Pages [][2]int64 `json:"pages"`
}

// resident reports every regular file below dir of which a page is in the page cache.
func resident(dir string, report func(residentFile) error) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		pages, err := residentPages(path)
		if err != nil {
			return fmt.Errorf("looking at %s: %w", path, err)
		}
		if len(pages) == 0 {
			return nil
		}
		return report(residentFile{path, pages})
	})
}

func residentPages(path string) ([][2]int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return nil, err
	}
	mapped, err := unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(mapped)
	size := int64(os.Getpagesize())
	states := make([]byte, (info.Size()+size-1)/size)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(len(mapped)), uintptr(unsafe.Pointer(&states[0]))); errno != 0 {
		return nil, errno
	}
	var ranges [][2]int64
	for page, state := range states {
		if state&1 == 0 {
			continue
		}
		page := int64(page)
		if last := len(ranges) - 1; last >= 0 && ranges[last][1] == page {
			ranges[last][1]++
		} else {
			ranges = append(ranges, [2]int64{page, page + 1})
		}
	}
	return ranges, nil
}
