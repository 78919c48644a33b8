package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// prepareLimit bounds prepareCmd. The boot waits for it.
const prepareLimit = 15 * time.Second

// prepareCmd does what the service's sandbox forbids, before the service is
// started: it loads the kernel's modules, sizes its table of connections, and
// takes our directories back from whomever they may belong to. It is not for
// people.
func (a *app) prepareCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "prepare",
		Short:  "Load the kernel's modules that the service will need",
		Hidden: true,
		Args:   noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			ctx, cancel := context.WithTimeout(ctx, prepareLimit)
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := w.agent.Conntrack.Grow(ctx)
				if st, e := w.agent.Store.Load(); e != nil || st.Backend.Name != agent.Nftables {
					e := w.kernel.Prepare(ctx)
					if err = errors.Join(err, e); e != nil { // the rules may have to go elsewhere
						err = errors.Join(err, a.sys.MkdirAll(filepath.Dir(agent.TableFile), 0o755))
					}
				}
				for dir, mode := range map[string]fs.FileMode{store.Dir: 0o700, store.RunDir: 0o755} {
					if a.sys.Exists(dir) {
						err = errors.Join(err, a.sys.MkdirAll(dir, mode))
					}
				}
				done <- err
			}()
			select {
			case err := <-done:
				return err
			case <-ctx.Done():
				// A program that waits within the kernel cannot even be killed.
				return fmt.Errorf("preparing the kernel took more than %v: going on without its end", prepareLimit)
			}
		}),
	}
}
