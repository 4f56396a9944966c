"""What a GKE cluster gets: the JobSet, held against the schemas of Kubernetes and of JobSet."""

import copy
import json
import pathlib
import re

import fakes
import jsonschema
import pytest
import yaml

_SLICE = ['--image', 'host/i:1', '--accelerator', 'tpu-v6e-slice', '--topology', '4x4']
_COMMAND = ['--', 'python', *fakes.ODD]


@pytest.fixture
def gke(tmp_path):
  made = fakes.Cluster(tmp_path)
  made.add('kubectl')
  made.add('xpk')
  return made


def _shown(gke, *words: str) -> dict:
  done = gke.run('launch_gke', 'run-1', *words, '--dry_run', *_COMMAND)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def _pod(manifest: dict) -> dict:
  return manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']


def _in_container(text: str) -> str:
  """What Kubernetes hands over for a word: $$ stands for $, and $(NAME) for a variable."""
  assert not re.search(r'\$\(', text.replace('$$', '')), 'would be taken for a variable'
  return text.replace('$$', '$')


def test_a_slice_becomes_a_jobset_whose_hosts_each_run_the_command(gke):
  manifest = _shown(gke, *_SLICE)
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert manifest['metadata']['name'] == 'run-1' and 'namespace' not in manifest['metadata']
  group, = manifest['spec']['replicatedJobs']
  job = group['template']['spec']
  assert (group['replicas'], job['parallelism'], job['completions']) == (1, 4, 4)
  assert (job['backoffLimit'], manifest['spec']['failurePolicy']['maxRestarts']) == (0, 20)
  container, = _pod(manifest)['containers']
  assert [_in_container(word) for word in container['command']] == ['python', *fakes.ODD]
  assert container['image'] == 'host/i:1' and container['resources']['limits'] == {
    'google.com/tpu': '4'}
  assert container['env'] == [{'name': 'T5X_LIKE_CLUSTER', 'value': 'auto'}]
  assert _pod(manifest)['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
    'cloud.google.com/gke-tpu-topology': '4x4'}


@pytest.mark.parametrize('topology, extra, hosts, chips', [
    ('1x1', [], 1, '1'), ('2x2', [], 1, '4'), ('2x4', [], 2, '4'), ('16x16', [], 64, '4'),
    ('2x4', ['--chips_per_host', '8'], 1, '8'), ('4x4x8', [], 32, '4')])
def test_hosts_follow_from_the_topology(gke, topology, extra, hosts, chips):
  manifest = _shown(gke, *_SLICE[:-1], topology, *extra)
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completions'] == job['parallelism'] == hosts
  assert _pod(manifest)['containers'][0]['resources']['limits']['google.com/tpu'] == chips


def test_every_option_reaches_the_manifest(gke):
  value = 'a: "b" $(HOME) #c'
  manifest = _shown(gke, *_SLICE, '--slices', '3', '--spot', '--restarts', '0', '--grace', '60',
                    '--service_account', 'writer', '--namespace', 'lab', '--env', f'A={value}',
                    '--volume', 'share:/my share', '--volume', '1e3:/b')
  assert manifest['metadata']['namespace'] == 'lab'
  assert manifest['spec']['replicatedJobs'][0]['replicas'] == 3
  assert manifest['spec']['failurePolicy']['maxRestarts'] == 0
  pod = _pod(manifest)
  assert pod['serviceAccountName'] == 'writer' and pod['terminationGracePeriodSeconds'] == 60
  assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
  assert [_in_container(e['value']) for e in pod['containers'][0]['env']] == ['auto', value]
  assert pod['containers'][0]['volumeMounts'] == [
    {'name': 'share', 'mountPath': '/my share'}, {'name': '1e3', 'mountPath': '/b'}]
  assert [volume['persistentVolumeClaim']['claimName'] for volume in pod['volumes']] == [
    'share', '1e3']


# The fields of JobSet that Kubernetes itself does not know, after hack/python-sdk/swagger.json of
# https://github.com/kubernetes-sigs/jobset (v1alpha2). A field that is not listed is refused.
def _object(required: list[str], **properties) -> dict:
  return {'type': 'object', 'required': required, 'properties': properties,
          'additionalProperties': False}


_COUNT, _NAME = {'type': 'integer', 'minimum': 0}, {'type': 'string', 'minLength': 1}
_RULE = _object(
  ['name', 'action'],
  name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
  action={'enum': ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']},
  onJobFailureReasons={'type': 'array', 'items': {'enum': [
    'BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes', 'MaxFailedIndexesExceeded',
    'PodFailurePolicy']}})
_JOBSET = _object(
  ['apiVersion', 'kind', 'metadata', 'spec'], apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
  kind={'const': 'JobSet'},
  metadata=_object(['name'], name=_NAME, namespace=_NAME, annotations={'type': 'object'}),
  spec=_object(
    ['replicatedJobs'],
    failurePolicy=_object([], maxRestarts=_COUNT, rules={'type': 'array', 'items': _RULE}),
    replicatedJobs={'type': 'array', 'minItems': 1, 'items': _object(
      ['name', 'template'], name=_NAME, replicas=_COUNT,
      template=_object(['spec'], spec={'type': 'object'}))}))


@pytest.fixture(params=['plain', 'everything'])
def manifest(gke, request):
  extra = [] if request.param == 'plain' else [
    '--slices', '2', '--spot', '--service_account', 's', '--namespace', 'n', '--env', 'A=b',
    '--volume', 'share:/shared']
  return _shown(gke, *_SLICE, *extra)


def test_the_jobset_has_the_fields_of_its_schema(manifest):
  jsonschema.validate(manifest, _JOBSET)
  wrong = copy.deepcopy(manifest)
  wrong['spec']['failurePolicy']['maxRestart'] = 3
  with pytest.raises(jsonschema.ValidationError, match='maxRestart'):
    jsonschema.validate(wrong, _JOBSET)


def test_its_job_has_the_fields_of_kubernetes(manifest):
  kubernetes = pytest.importorskip(
    'kubernetes_validate', reason='kubernetes-validate is not installed: scripts/setup dev')
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'a'},
         **manifest['spec']['replicatedJobs'][0]['template']}
  for version in ('1.31', '1.37'):
    kubernetes.validate(job, version, strict=True)
  wrong = copy.deepcopy(job)
  wrong['spec']['template']['spec']['containers'][0]['commands'] = ['x']
  with pytest.raises(kubernetes.ValidationError, match='commands'):
    kubernetes.validate(wrong, '1.37', strict=True)


def test_kubectl_gets_what_the_dry_run_shows(gke):
  shown = gke.run('launch_gke', 'a', *_SLICE, '--dry_run', *_COMMAND)
  assert not gke.calls()
  done = gke.run('launch_gke', 'a', *_SLICE, *_COMMAND)
  assert done.returncode == 0 and gke.calls() == [['kubectl', 'apply', '-f', '-']]
  assert pathlib.Path(f'{gke.calls_file}.stdin').read_text() == shown.stdout
  assert 'kubectl delete jobset a' in done.stdout
  gke.add('kubectl', "sys.exit('the server says no')")
  done = gke.run('launch_gke', 'a', *_SLICE, *_COMMAND)
  assert done.returncode and 'the server says no' in done.stderr and 'follow' not in done.stdout


def test_xpk_makes_the_same_run_where_told(gke):
  words = ['launch_gke', 'a', '--xpk', '--image', 'i', '--cluster', 'c', '--tpu_type', 'v6e-16',
           '--slices', '2', '--zone', 'z', '--project', 'p', '--env', 'A=b c']
  done = gke.run(*words, *_COMMAND)
  assert done.returncode == 0, done.stderr
  call, = gke.calls()
  assert call[:-1] == [
    'xpk', 'workload', 'create', '--workload', 'a', '--cluster', 'c', '--tpu-type=v6e-16',
    '--num-slices=2', '--docker-image=i', '--max-restarts=20',
    '--termination-grace-period-seconds=120', '--zone=z', '--project=p']
  assert fakes.words(call[-1].removeprefix('--command=')) == [
    'env', 'T5X_LIKE_CLUSTER=auto', 'A=b c', 'python', *fakes.ODD]
  shown = gke.run(*words, '--dry_run', *_COMMAND)
  assert fakes.words(shown.stdout) == call and len(gke.calls()) == 1


@pytest.mark.parametrize('words, text', [
    ([], 'the first word is the name of the run'),
    (['a_b', *_SLICE], "the name 'a_b' must be 1 to 40 lower-case letters"),
    (['a', *_SLICE], 'no command; write it after --'),
    (['a', '--', 'x'], 'no image; add --image'),
    (['a', *_SLICE[:2], '--', 'x'], 'no accelerator; add --accelerator'),
    (['a', *_SLICE[:4], '--', 'x'], 'no topology; add --topology, such as 4x4'),
    (['a', '--topology', '16'], "--topology takes 4x4 or 4x4x8, but got '16'"),
    (['a', *_SLICE, '--chips_per_host', '3', '--', 'x'],
     'the 16 chips of 4x4 do not divide into hosts of 3; set --chips_per_host'),
    (['a', '--volume', 'share'], "--volume takes CLAIM:/path, but got 'share'"),
    (['a', '--env', 'A b=c'], "--env takes NAME=VALUE, but got 'A b=c'"),
    (['a', *_SLICE, '--zone', 'z', '--', 'x'], '--cluster, --tpu_type, --zone and --project are'),
    (['a', '--xpk', '--image', 'i', '--', 'x'], '--xpk needs --cluster'),
    (['a', '--xpk', '--image', 'i', '--cluster', 'c', '--', 'x'], '--xpk needs --tpu_type'),
    (['a', '--xpk', *_SLICE, '--cluster', 'c', '--tpu_type', 't', '--', 'x'],
     '--accelerator, --topology, --chips_per_host'),
    (['a', '--gpus', '1'], "unknown option '--gpus'; see scripts/launch_gke --help"),
])
def test_refusals(gke, words, text):
  done = gke.run('launch_gke', *words)
  assert done.returncode == 2 and done.stderr.startswith(f'error: {text}'), done.stderr
  assert not gke.calls()


def test_words_survive_json_and_yaml_alike(gke):
  done = gke.run('launch_gke', 'a', *_SLICE, '--dry_run', '--', 'tab\tline\nend', '\\"', 'yes', '1')
  command = yaml.safe_load(done.stdout)
  assert _pod(command)['containers'][0]['command'] == ['tab\tline\nend', '\\"', 'yes', '1']
  assert json.dumps('tab\tline\nend') in done.stdout
