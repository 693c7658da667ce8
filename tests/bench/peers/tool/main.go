// Command millstream-bench-tool does for the bench what needs system calls or a peer's library: it lists the files that a
// start opens, the pages that it touched, and converts images to eStargz.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
)

const usage = `usage:
  millstream-bench-tool opens MOUNTPOINT             paths opened below a mount, each once, until SIGTERM; waits for the mount
  millstream-bench-tool resident DIR                 page ranges of regular files that are in the page cache, as JSON lines
  millstream-bench-tool estargz LAYOUT TAG NEW [LIST] converts the image TAG of an OCI layout into NEW; LIST: what comes first
`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "millstream-bench-tool:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 2 && arguments[0] == "opens":
		return opens(arguments[1])
	case len(arguments) == 2 && arguments[0] == "resident":
		out := bufio.NewWriter(os.Stdout)
		encoder := json.NewEncoder(out)
		if err := resident(arguments[1], func(file residentFile) error { return encoder.Encode(file) }); err != nil {
			return err
		}
		return out.Flush()
	case len(arguments) >= 4 && len(arguments) <= 5 && arguments[0] == "estargz":
		list := ""
		if len(arguments) == 5 {
			list = arguments[4]
		}
		return convert(arguments[1], arguments[2], arguments[3], list)
	}
	fmt.Fprint(os.Stderr, usage)
	return fmt.Errorf("no such command")
}
