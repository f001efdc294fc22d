{{- define "kvrelay.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What a selector may say: it can never change afterwards. */}}
{{- define "kvrelay.selector" -}}
app.kubernetes.io/name: kvrelay
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "kvrelay.labels" -}}
{{ include "kvrelay.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kvrelay
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "kvrelay.image" -}}
{{- if .image.digest }}{{ .image.repository }}@{{ .image.digest }}
{{- else }}{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "kvrelay.joinSecret" -}}
{{ .Values.join.existingSecret | default (printf "%s-join-token" (include "kvrelay.fullname" .)) }}
{{- end }}

{{/* Every router by its own name: a worker joins all of them. */}}
{{- define "kvrelay.routerHost" -}}
{{ printf "%s-router-%d.%s-join.%s.svc.%s" .fullname .index .fullname .root.Release.Namespace .root.Values.clusterDomain }}
{{- end }}

{{- define "kvrelay.joinAddresses" -}}
{{- $fullname := include "kvrelay.fullname" . }}{{ $hosts := list }}
{{- range $index := until (int .Values.router.replicas) }}
{{- $hosts = append $hosts (printf "%s:8001" (include "kvrelay.routerHost" (dict "root" $ "fullname" $fullname "index" $index))) }}
{{- end }}{{ join "," $hosts }}
{{- end }}

{{/* Model and revision as arguments; a hub id without a commit is refused. */}}
{{- define "kvrelay.modelArgs" -}}
{{- $m := .Values.model }}
{{- $hub := regexMatch "^[^/.~][^/:]*/[^/:]+$" $m.reference }}
{{- if and $hub (not $m.allowMutableRevision) (not (regexMatch "^[0-9a-f]{40}$" $m.revision)) }}
{{- fail (printf "model.revision %q is no commit of %s: name one (40 hex digits), or set model.allowMutableRevision=true and accept that workers of one pool may load different weights" $m.revision $m.reference) }}
{{- end }}
{{- if and (hasPrefix "/models/" $m.reference) (not $m.existingClaim) }}
{{- fail (printf "model.reference %q is on no volume: name the claim in model.existingClaim" $m.reference) }}
{{- end }}
{{- with $m.reference }}
- {{ . | quote }}
{{- end }}
{{- with $m.revision }}
- --revision={{ . }}
{{- end }}
{{- with $m.servedName }}
- --served-model-name={{ . }}
{{- end }}
{{- end }}

{{- define "kvrelay.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kvrelay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "kvrelay.commonEnv" -}}
- name: KVRELAY_JOIN_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "kvrelay.joinSecret" . }}, key: token}}
{{- with .Values.model.hubTokenSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
{{- end }}
{{- with .Values.telemetry.otlpEndpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "kvrelay.commonMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if .Values.model.existingClaim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "kvrelay.commonVolumes" -}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
{{- if .Values.cache.existingClaim }}
- {name: cache, persistentVolumeClaim: {claimName: {{ .Values.cache.existingClaim }}}}
{{- else }}
- {name: cache, emptyDir: {sizeLimit: {{ .Values.cache.sizeLimit }}}}
{{- end }}
{{- with .Values.model.existingClaim }}
- {name: models, persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}}
{{- end }}
{{- end }}

{{- define "kvrelay.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "kvrelay.selector" . | nindent 6 }}
{{- end }}
