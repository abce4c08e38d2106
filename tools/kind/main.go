// Kindcheck reads kind's cluster configurations as kind itself does, without Docker: it decodes and validates each
// file, then generates kubeadm's configuration of each node with the file's patches, and prints what came of it.
//
// kind has no command for that, and its packages are internal; the module's path lies inside kind's for that reason.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"
	"sigs.k8s.io/kind/pkg/apis/config/defaults"
	"sigs.k8s.io/kind/pkg/cluster/internal/kubeadm"
	"sigs.k8s.io/kind/pkg/internal/apis/config"
	"sigs.k8s.io/kind/pkg/internal/apis/config/encoding"
	"sigs.k8s.io/kind/pkg/internal/patch"
)

// Kubernetes versions on both sides of the one where kind changes kubeadm's API version.
var versions = []string{"v1.35.0", "v1.36.1"}

type node struct {
	Role   string            `json:"role"`
	NodeIP map[string]string `json:"nodeIP"` // by Kubernetes version
	Mounts []string          `json:"mounts"`
}

type report struct {
	Name       string `json:"name"`
	PodSubnet  string `json:"podSubnet"`
	DefaultCNI bool   `json:"defaultCNI"`
	Image      string `json:"defaultImage"` // what this kind makes nodes of by itself
	Nodes      []node `json:"nodes"`
}

func main() {
	code := 0
	for _, path := range os.Args[1:] {
		if err := check(path); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
			code = 1
		}
	}
	os.Exit(code)
}

func check(path string) error {
	cluster, err := encoding.Load(path)
	if err != nil {
		return err
	}
	config.SetDefaultsCluster(cluster)
	if err := cluster.Validate(); err != nil {
		return err
	}
	result := report{
		Name:       cluster.Name,
		PodSubnet:  cluster.Networking.PodSubnet,
		DefaultCNI: !cluster.Networking.DisableDefaultCNI,
		Image:      defaults.Image,
	}
	for i := range cluster.Nodes {
		found, err := checkNode(cluster, i)
		if err != nil {
			return fmt.Errorf("node %d: %w", i, err)
		}
		result.Nodes = append(result.Nodes, found)
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

func checkNode(cluster *config.Cluster, i int) (node, error) {
	spec := cluster.Nodes[i]
	found := node{Role: string(spec.Role), NodeIP: map[string]string{}}
	for _, mount := range spec.ExtraMounts {
		found.Mounts = append(found.Mounts, mount.ContainerPath)
	}
	for _, version := range versions {
		text, err := kubeadm.Config(kubeadm.ConfigData{
			ClusterName:          cluster.Name,
			KubernetesVersion:    version,
			ControlPlaneEndpoint: "172.18.0.2:6443",
			APIBindPort:          6443,
			APIServerAddress:     cluster.Networking.APIServerAddress,
			NodeProvider:         "docker",
			ControlPlane:         spec.Role == config.ControlPlaneRole,
			NodeAddress:          "172.18.0.3",
			NodeName:             fmt.Sprintf("%s-%d", cluster.Name, i),
			Token:                kubeadm.Token,
			KubeProxyMode:        string(cluster.Networking.KubeProxyMode),
			PodSubnet:            cluster.Networking.PodSubnet,
			ServiceSubnet:        cluster.Networking.ServiceSubnet,
			IPFamily:             cluster.Networking.IPFamily,
		})
		if err != nil {
			return found, err
		}
		// As kind does: the cluster's patches first, then the node's.
		for _, patches := range [][]string{cluster.KubeadmConfigPatches, spec.KubeadmConfigPatches} {
			if text, err = patch.KubeYAML(text, patches, nil); err != nil {
				return found, err
			}
		}
		kind := "JoinConfiguration"
		if i == 0 {
			kind = "InitConfiguration"
		}
		if found.NodeIP[version], err = nodeIP(text, kind); err != nil {
			return found, err
		}
	}
	return found, nil
}

// nodeIP returns what kubelet of a node is told by its own kubeadm object; both ways of writing arguments are read.
func nodeIP(text, kind string) (string, error) {
	for _, document := range strings.Split(text, "\n---\n") {
		var object struct {
			Kind             string `yaml:"kind"`
			NodeRegistration struct {
				KubeletExtraArgs yaml.Node `yaml:"kubeletExtraArgs"`
			} `yaml:"nodeRegistration"`
		}
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			return "", err
		}
		if object.Kind != kind {
			continue
		}
		arguments := object.NodeRegistration.KubeletExtraArgs
		var asMap map[string]string
		if arguments.Decode(&asMap) == nil {
			return asMap["node-ip"], nil
		}
		var asList []struct{ Name, Value string }
		if err := arguments.Decode(&asList); err != nil {
			return "", err
		}
		last := ""
		for _, argument := range asList {
			if argument.Name == "node-ip" {
				last = argument.Value
			}
		}
		return last, nil
	}
	return "", errors.New("no " + kind)
}
