// Judge documents of custom resources, an array of JSON on standard input: values by the schemas of
// their CRDs, and unknown fields by their types, since the schemas let those pass. What is wrong goes
// to standard output, and the exit code is 1.
import {execFileSync} from 'node:child_process';
import {readFileSync, writeFileSync} from 'node:fs';

const PACKAGES = {
  'argoproj.io': 'argo-rollouts',
  'gateway.networking.k8s.io': 'gateway-api',
  'keda.sh': 'keda',
  'monitoring.coreos.com': 'prometheus-operator',
};
const here = new URL('.', import.meta.url).pathname;
const documents = JSON.parse(readFileSync(0, 'utf8'));
const source = [];
let failed = false;
for (const [n, one] of documents.entries()) {
  const [group, version] = one.apiVersion.split('/');
  if (!(group in PACKAGES)) throw new Error(`got ${one.apiVersion}, want ${Object.keys(PACKAGES)}`);
  const module = `@kubernetes-models/${PACKAGES[group]}/${group}/${version}/${one.kind}`;
  const {[one.kind]: Model} = await import(module);
  try {
    new Model(one).validate();
  } catch (error) {
    failed = true;
    console.log(`${one.kind}/${one.metadata.name}: ${error}`);
  }
  source.push(`import type {I${one.kind} as T${n}} from "${module}";`);
  source.push(`export const d${n}: T${n} = ${JSON.stringify(one, null, 1)};`);
}
writeFileSync(`${here}documents.ts`, source.join('\n'));
try {
  const flags = ['--noEmit', '--strict', '--skipLibCheck', '--module', 'esnext'];
  const compiler = `${here}node_modules/typescript/bin/tsc`;
  execFileSync(process.execPath, [compiler, ...flags, '--moduleResolution', 'bundler', 'documents.ts'],
    {cwd: here, encoding: 'utf8'});
} catch (error) {
  failed = true;
  console.log(error.stdout);
}
process.exitCode = failed ? 1 : 0;
