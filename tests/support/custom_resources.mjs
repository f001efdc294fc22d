// Checks custom resources against the schemas of their operators.
//   node custom_resources.mjs FOLDER_WITH_NODE_MODULES < OBJECTS.json
// Prints one line per problem; exit code 1 where there is one, or where a kind is not known.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const packages = resolve(process.argv[2], "node_modules", "@kubernetes-models");
const operator = resolve(packages, "prometheus-operator", "monitoring.coreos.com", "v1");
const load = (kind) => import(pathToFileURL(resolve(operator, `${kind}.js`)));
const kinds = {
  ...createRequire(resolve(packages, "package.json"))("@kubernetes-models/keda/keda.sh/v1alpha1"),
  ...(await load("ServiceMonitor")),
  ...(await load("PrometheusRule")),
};

let problems = 0;
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const name = `${object.kind}/${object.metadata.name}`;
  try {
    new kinds[object.kind](object).validate();
  } catch (error) {
    problems += 1;
    console.log(`${name}: ${error.message}`);
  }
}
process.exit(problems ? 1 : 0);
