// Prints what virt-operator would install of this KubeVirt release, one JSON object a line.
package main

import (
	"encoding/json"
	"log"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	v1 "kubevirt.io/api/core/v1"

	"kubevirt.io/kubevirt/pkg/virt-operator/resource/generate/components"
	"kubevirt.io/kubevirt/pkg/virt-operator/resource/generate/install"
	"kubevirt.io/kubevirt/pkg/virt-operator/util"
)

func main() {
	config := util.GetTargetConfigFromKV(&v1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: "kubevirt"}})
	strategy, err := install.GenerateCurrentInstallStrategy(config, "", "kubevirt")
	if err != nil {
		log.Fatal(err)
	}
	kubevirt, err := components.NewKubeVirtCrd()
	if err != nil {
		log.Fatal(err)
	}
	printed := json.NewEncoder(os.Stdout)
	show := func(object any) {
		if err := printed.Encode(object); err != nil {
			log.Fatal(err)
		}
	}
	show(kubevirt)
	each(strategy.CRDs(), show)
	each(strategy.ServiceAccounts(), show)
	each(strategy.ClusterRoles(), show)
	each(strategy.ClusterRoleBindings(), show)
	each(strategy.Roles(), show)
	each(strategy.RoleBindings(), show)
	each(strategy.MutatingWebhookConfigurations(), show)
	each(strategy.ValidatingWebhookConfigurations(), show)
	each(strategy.APIServices(), show)
	each(strategy.ConfigMaps(), show)
}

func each[T any](objects []T, show func(any)) {
	for _, object := range objects {
		show(object)
	}
}
