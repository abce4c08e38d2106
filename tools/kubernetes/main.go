// Command kubernetes is a control plane in one program: it is the component that it is called as.
//
// One program, because the components share nearly all of their code, and building and keeping it once costs a third.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/version" // the version as a metric, as the components have it
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

func main() {
	arguments := os.Args
	name := filepath.Base(arguments[0])
	// Under a name of its own, as a build has it, the component is the first word.
	if _, known := components[name]; !known && len(arguments) > 1 {
		arguments = arguments[1:]
		name = arguments[0]
	}
	run, known := components[name]
	if !known {
		fmt.Fprintf(os.Stderr, "%q is no component; there are etcd, kube-apiserver and kube-controller-manager\n", name)
		os.Exit(2)
	}
	os.Args = arguments
	os.Exit(run())
}

var components = map[string]func() int{
	"etcd": func() int {
		etcdmain.Main(os.Args)
		return 0
	},
	"kube-apiserver":          func() int { return cli.Run(apiserver.NewAPIServerCommand()) },
	"kube-controller-manager": func() int { return cli.Run(controllers.NewControllerManagerCommand()) },
}
