"""De-identification tables of enhanced (multi-frame) images: functional groups. `profile.py` explains the form.

GROUPS is the table of every item of the shared and of the per-frame sequence.
"""

from fedscan_client.intake.profile import tables

ENHANCED = tables(r"""
[ENHANCED] C.7.6.16 Multi-frame Functional Groups; C.7.6.17 Dimension; C.7.5.2 Enhanced Equipment; C.12.1 Concatenation
0008,0023 ContentDate date 2c
0008,0033 ContentTime dummy:000000 1
0008,002A AcquisitionDateTime date 3
0008,0070 Manufacturer maker 2c
0008,1090 ManufacturerModelName dummy:removed 1
0018,1000 DeviceSerialNumber dummy:removed 1
0018,1020 SoftwareVersions dummy:removed 1
0018,9004 ContentQualification code 3
0018,9073 AcquisitionDuration number:0:1e9 3
0020,0052 FrameOfReferenceUID frame 3
0020,0242 SOPInstanceUIDOfConcatenationSource uid 3
0020,1040 PositionReferenceIndicator empty 2c
0020,9161 ConcatenationUID uid 3
0020,9162 InConcatenationNumber number:0:65535 3
0020,9163 InConcatenationTotalNumber number:0:65535 3
0020,9221 DimensionOrganizationSequence items:DIMENSION 2c
0020,9222 DimensionIndexSequence items:DIMENSION 2c
0020,9228 ConcatenationFrameOffsetNumber number:0:1000000 3
0020,9311 DimensionOrganizationType code 3
0040,0555 AcquisitionContextSequence empty 2
5200,9229 SharedFunctionalGroupsSequence items:GROUPS 3
5200,9230 PerFrameFunctionalGroupsSequence items:GROUPS 3

[DIMENSION] C.7.6.17 Multi-frame Dimension
0020,9164 DimensionOrganizationUID uid 3
0020,9165 DimensionIndexPointer pointer 3
0020,9167 FunctionalGroupPointer pointer 3

[GROUPS] C.7.6.16.2 common functional groups; C.8.15.3, C.8.13.5 and C.8.22.5 those of CT, MR and PET
0018,9006 MRImagingModifierSequence items:MR_IMAGING 3
0018,9042 MRReceiveCoilSequence items:MR_RECEIVE 3
0018,9049 MRTransmitCoilSequence items:MR_TRANSMIT 3
0018,9112 MRTimingAndRelatedParametersSequence items:MR_TIMING 3
0018,9114 MREchoSequence items:MR_ECHO 3
0018,9115 MRModifierSequence items:MR_MODIFIER 3
0018,9117 MRDiffusionSequence items:MR_DIFFUSION 3
0018,9118 CardiacSynchronizationSequence items:CARDIAC 3
0018,9119 MRAveragesSequence items:MR_AVERAGES 3
0018,9125 MRFOVGeometrySequence items:MR_FOV 3
0018,9226 MRImageFrameTypeSequence items:FRAME_TYPE 3
0018,9301 CTAcquisitionTypeSequence items:CT_TYPE 3
0018,9304 CTAcquisitionDetailsSequence items:CT_DETAILS 3
0018,9308 CTTableDynamicsSequence items:CT_TABLE 3
0018,9312 CTGeometrySequence items:CT_GEOMETRY 3
0018,9314 CTReconstructionSequence items:CT_RECONSTRUCTION 3
0018,9321 CTExposureSequence items:CT_EXPOSURE 3
0018,9325 CTXRayDetailsSequence items:CT_XRAY 3
0018,9326 CTPositionSequence items:CT_POSITION 3
0018,9329 CTImageFrameTypeSequence items:FRAME_TYPE 3
0018,9477 IrradiationEventIdentificationSequence items:EVENT 3
0018,9735 PETPositionSequence items:PET_POSITION 3
0018,9751 PETFrameTypeSequence items:FRAME_TYPE 3
0020,9071 FrameAnatomySequence items:ANATOMY 3
0020,9111 FrameContentSequence items:FRAME 3
0020,9113 PlanePositionSequence items:POSITION 3
0020,9116 PlaneOrientationSequence items:ORIENTATION 3
0020,9170 UnassignedSharedConvertedAttributesSequence items:UNASSIGNED 3
0020,9171 UnassignedPerFrameConvertedAttributesSequence items:UNASSIGNED 3
0020,9253 RespiratorySynchronizationSequence items:RESPIRATION 3
0020,9310 TemporalPositionSequence items:TEMPORAL 3
0028,9110 PixelMeasuresSequence items:MEASURES 3
0028,9132 FrameVOILUTSequence items:FRAME_VOI 3
0028,9145 PixelValueTransformationSequence items:TRANSFORMATION 1c

[UNASSIGNED] C.7.6.16.2.25 Unassigned Converted Attributes (legacy converted images)
0020,0013 InstanceNumber number:0:999999 3

[MEASURES] C.7.6.16.2.1 Pixel Measures
0018,0050 SliceThickness number:0:1000 3
0018,0088 SpacingBetweenSlices number:-1000:1000 3
0028,0030 PixelSpacing number:0:1000 3

[FRAME] C.7.6.16.2.2 Frame Content
0018,9074 FrameAcquisitionDateTime date 3
0018,9151 FrameReferenceDateTime date 3
0018,9220 FrameAcquisitionDuration number:0:1e9 3
0020,9056 StackID index 3
0020,9057 InStackPositionNumber number:0:1000000 3
0020,9128 TemporalPositionIndex number:0:1000000 3
0020,9156 FrameAcquisitionNumber number:0:65535 3
0020,9157 DimensionIndexValues number:0:1000000 3
0018,9214 RespiratoryCyclePosition code 3
0018,9236 CardiacCyclePosition code 3

[POSITION] C.7.6.16.2.3 Plane Position
0020,0032 ImagePositionPatient number:-100000:100000 3

[ORIENTATION] C.7.6.16.2.4 Plane Orientation
0020,0037 ImageOrientationPatient number:-1.001:1.001 3

[ANATOMY] C.7.6.16.2.8 Frame Anatomy
0008,2218 AnatomicRegionSequence codes:4,4009,4031 3
0020,9072 FrameLaterality code 3

[TRANSFORMATION] C.7.6.16.2.9 Pixel Value Transformation
0028,1052 RescaleIntercept number:-1e9:1e9 1c
0028,1053 RescaleSlope number:-1e9:1e9 1c
0028,1054 RescaleType code 2c

[FRAME_VOI] C.7.6.16.2.10 Frame VOI LUT
0028,1050 WindowCenter number:-1e9:1e9 3
0028,1051 WindowWidth number:0:1e9 3
0028,1056 VOILUTFunction code 3
0028,3010 VOILUTSequence items:VOI_LUT 3

[EVENT] C.7.6.16.2.16 Irradiation Event Identification
0008,3010 IrradiationEventUID uid 3

[CARDIAC] C.7.6.16.2.7 Cardiac Synchronization
0018,9037 CardiacSynchronizationTechnique code 3
0020,9153 NominalCardiacTriggerDelayTime number:-1e9:1e9 3
0020,9241 NominalPercentageOfCardiacPhase number:-1000:1000 3

[RESPIRATION] C.7.6.16.2.17 Respiratory Synchronization
0018,9170 RespiratoryMotionCompensationTechnique code 3

[TEMPORAL] C.7.6.16.2.18 Temporal Position
0020,930D TemporalPositionTimeOffset number:-1e9:1e9 3

[FRAME_TYPE] C.8.15.3.1, C.8.13.5.1, C.8.22.5.1 CT, MR and PET Image Frame Type
0008,9007 FrameType imagetype 3
0008,9205 PixelPresentation code:MONOCHROME 3
0008,9206 VolumetricProperties code 3
0008,9207 VolumeBasedCalculationTechnique code 3
0008,9208 ComplexImageComponent code 3
0008,9209 AcquisitionContrast code 3

[ENHANCED_CT] C.8.15.2 Enhanced CT Image
0008,9205 PixelPresentation code:MONOCHROME 3
0008,9206 VolumetricProperties code 3
0008,9207 VolumeBasedCalculationTechnique code 3

[CT_TYPE] C.8.15.3.2 CT Acquisition Type
0018,9302 AcquisitionType code 3
0018,9303 TubeAngle number:-360:360 3
0018,9333 ConstantVolumeFlag code 3
0018,9334 FluoroscopyFlag code 3

[CT_DETAILS] C.8.15.3.3 CT Acquisition Details
0018,0090 DataCollectionDiameter number:0:10000 3
0018,1120 GantryDetectorTilt number:-90:90 3
0018,1130 TableHeight number:-10000:10000 3
0018,1140 RotationDirection code 3
0018,9305 RevolutionTime number:0:1000 3
0018,9306 SingleCollimationWidth number:0:1000 3
0018,9307 TotalCollimationWidth number:0:10000 3

[CT_TABLE] C.8.15.3.4 CT Table Dynamics
0018,9309 TableSpeed number:0:100000 3
0018,9310 TableFeedPerRotation number:0:100000 3
0018,9311 SpiralPitchFactor number:0:100 3

[CT_GEOMETRY] C.8.15.3.6 CT Geometry
0018,1110 DistanceSourceToDetector number:0:100000 3
0018,9335 DistanceSourceToDataCollectionCenter number:0:100000 3

[CT_POSITION] C.8.15.3.5 CT Position
0018,9313 DataCollectionCenterPatient number:-100000:100000 3
0018,9318 ReconstructionTargetCenterPatient number:-100000:100000 3
0018,9327 TablePosition number:-100000:100000 3

[CT_RECONSTRUCTION] C.8.15.3.7 CT Reconstruction
0018,1100 ReconstructionDiameter number:0:10000 3
0018,1210 ConvolutionKernel dummy:removed 2c
0018,9315 ReconstructionAlgorithm code 3
0018,9316 ConvolutionKernelGroup code 3
0018,9317 ReconstructionFieldOfView number:0:10000 3
0018,9319 ReconstructionAngle number:0:360 3
0018,9320 ImageFilter dummy:removed 2c
0018,9322 ReconstructionPixelSpacing number:0:1000 3

[CT_EXPOSURE] C.8.15.3.8 CT Exposure
0018,9323 ExposureModulationType dummy:UNKNOWN 2c
0018,9324 EstimatedDoseSaving number:-100:100 3
0018,9328 ExposureTimeInms number:0:1e9 3
0018,9330 XRayTubeCurrentInmA number:0:1e6 3
0018,9332 ExposureInmAs number:0:1e9 3
0018,9345 CTDIvol number:0:100000 3
0018,9346 CTDIPhantomTypeCodeSequence codes:4052 3

[CT_XRAY] C.8.15.3.9 CT X-Ray Details
0018,0060 KVP number:0:1000 3
0018,1160 FilterType dummy:removed 2c
0018,1190 FocalSpots number:0:100 3
0018,7050 FilterMaterial code 3
0018,9351 CalciumScoringMassFactorPatient number:0:1000 3
0018,9352 CalciumScoringMassFactorDevice number:0:1000 3

[ENHANCED_MR] C.8.13.1 Enhanced MR Image; C.8.13.3 common CT/MR description; C.8.13.4 MR Pulse Sequence
0008,9205 PixelPresentation code:MONOCHROME 3
0008,9206 VolumetricProperties code 3
0008,9207 VolumeBasedCalculationTechnique code 3
0008,9208 ComplexImageComponent code 3
0008,9209 AcquisitionContrast code 3
0018,0023 MRAcquisitionType code 3
0018,0087 MagneticFieldStrength number:0:30 3
0018,9005 PulseSequenceName dummy:removed 2c
0018,9008 EchoPulseSequence code 3
0018,9011 MultipleSpinEcho code 3
0018,9012 MultiPlanarExcitation code 3
0018,9014 PhaseContrast code 3
0018,9015 TimeOfFlightContrast code 3
0018,9017 SteadyStatePulseSequence code 3
0018,9018 EchoPlanarPulseSequence code 3
0018,9024 SaturationRecovery code 3
0018,9025 SpectrallySelectedSuppression code 3
0018,9029 OversamplingPhase code 3
0018,9032 GeometryOfKSpaceTraversal code 3
0018,9033 SegmentedKSpaceTraversal code 3
0018,9034 RectilinearPhaseEncodeReordering code 3
0018,9064 KSpaceFiltering code 3
0018,9093 NumberOfKSpaceTrajectories number:0:65535 3
0018,9094 CoverageOfKSpace code 3
0018,9100 ResonantNucleus code 3
0018,9174 ApplicableSafetyStandardAgency code 3

[MR_TIMING] C.8.13.5.2 MR Timing and Related Parameters
0018,0080 RepetitionTime number:0:1000000 3
0018,0091 EchoTrainLength number:0:100000 3
0018,1314 FlipAngle number:-360:360 3
0018,9180 GradientOutputType code 3
0018,9182 GradientOutput number:0:1e9 3
0018,9240 RFEchoTrainLength number:0:65535 3
0018,9241 GradientEchoTrainLength number:0:65535 3

[MR_FOV] C.8.13.5.3 MR FOV/Geometry
0018,0093 PercentSampling number:0:10000 3
0018,0094 PercentPhaseFieldOfView number:0:10000 3
0018,1312 InPlanePhaseEncodingDirection code 3
0018,9058 MRAcquisitionFrequencyEncodingSteps number:0:65535 3
0018,9231 MRAcquisitionPhaseEncodingStepsInPlane number:0:65535 3
0018,9232 MRAcquisitionPhaseEncodingStepsOutOfPlane number:0:65535 3

[MR_ECHO] C.8.13.5.4 MR Echo
0018,9082 EffectiveEchoTime number:0:1e6 3

[MR_MODIFIER] C.8.13.5.5 MR Modifier
0018,9009 InversionRecovery code 3
0018,9010 FlowCompensation code 3
0018,9016 Spoiling code 3
0018,9021 T2Preparation code 3
0018,9026 SpectrallySelectedExcitation code 3
0018,9027 SpatialPresaturation code 3
0018,9069 ParallelReductionFactorInPlane number:0:1000 3
0018,9077 ParallelAcquisition code 3
0018,9078 ParallelAcquisitionTechnique code 3
0018,9079 InversionTimes number:0:1e6 3
0018,9081 PartialFourier code 3
0018,9155 ParallelReductionFactorOutOfPlane number:0:1000 3
0018,9168 ParallelReductionFactorSecondInPlane number:0:1000 3

[MR_IMAGING] C.8.13.5.6 MR Imaging Modifier
0018,0095 PixelBandwidth number:0:1000000 3
0018,9020 MagnetizationTransfer code 3
0018,9022 BloodSignalNulling code 3
0018,9028 Tagging code 3

[MR_RECEIVE] C.8.13.5.7 MR Receive Coil
0018,1250 ReceiveCoilName dummy:removed 2c
0018,9041 ReceiveCoilManufacturerName empty 2c
0018,9043 ReceiveCoilType code 3
0018,9044 QuadratureReceiveCoil code 3

[MR_TRANSMIT] C.8.13.5.8 MR Transmit Coil
0018,1251 TransmitCoilName dummy:removed 2c
0018,9050 TransmitCoilManufacturerName empty 2c
0018,9051 TransmitCoilType code 3

[MR_DIFFUSION] C.8.13.5.9 MR Diffusion
0018,9075 DiffusionDirectionality code 3
0018,9076 DiffusionGradientDirectionSequence items:MR_DIRECTION 3
0018,9087 DiffusionBValue number:0:100000 3

[MR_DIRECTION] C.8.13.5.9 MR Diffusion
0018,9089 DiffusionGradientOrientation number:-1.001:1.001 3

[MR_AVERAGES] C.8.13.5.10 MR Averages
0018,0083 NumberOfAverages number:0:100000 3

[ENHANCED_PT] C.8.22.4 Enhanced PET Image
0008,9205 PixelPresentation code:MONOCHROME 3
0008,9206 VolumetricProperties code 3
0008,9207 VolumeBasedCalculationTechnique code 3
0054,1001 Units code 3
0054,1002 CountsSource code 3
0054,1102 DecayCorrection code 3

[PET_POSITION] C.8.22.5.4 PET Position
0018,9313 DataCollectionCenterPatient number:-100000:100000 3
0018,9318 ReconstructionTargetCenterPatient number:-100000:100000 3
0018,9327 TablePosition number:-100000:100000 3
""")
